"""The user's model: its code, its weights, its layers."""
