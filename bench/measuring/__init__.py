"""Time, memory, energy and accuracy of one case or many."""
