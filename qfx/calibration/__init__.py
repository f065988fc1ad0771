"""What is learned from data that goes through a model: statistics, and scales from them."""
