"""Training in several processes: what they exchange, and a base that they divide."""
