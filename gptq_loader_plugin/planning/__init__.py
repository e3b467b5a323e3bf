"""Which kernel runs which layer on which device, and what that takes in memory."""
