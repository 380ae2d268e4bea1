"""Fine-tuning: recipes, the training loop, what is kept of it, and how it goes on."""
