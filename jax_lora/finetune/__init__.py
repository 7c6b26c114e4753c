"""Fine-tuning: settings, loss, the step, the loop, generation, and the judge of answers."""
