"""What a method does to answers, compute, memory and time."""
