"""Files as people have them: JSON read strictly, what is not ours named."""
