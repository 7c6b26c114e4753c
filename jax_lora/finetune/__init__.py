"""Fine-tuning: data, loss, the loop, generation, and the judge of answers."""
