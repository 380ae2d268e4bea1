"""What a user would weigh a structured model against: other ways to make the original faster."""
