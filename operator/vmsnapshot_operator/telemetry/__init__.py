"""What the operator tells of itself: metrics, logs, heartbeats, and the port that serves them."""
