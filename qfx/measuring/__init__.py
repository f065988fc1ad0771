"""Two models beside each other: accuracy, latency, bytes, memory."""
