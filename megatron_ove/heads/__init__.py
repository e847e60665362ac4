"""Parameters and maths that objectives use; they know nothing of Batch."""
