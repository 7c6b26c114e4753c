"""What a run will take, in memory, arithmetic and time, before anything is loaded."""
