"""Text and conversations to ids and back."""
