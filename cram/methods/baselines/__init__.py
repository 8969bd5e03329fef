"""LoRA without a method around it: one for all tasks, one with kept data, one per task."""
