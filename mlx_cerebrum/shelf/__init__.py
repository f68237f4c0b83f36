"""The shelf: models kept under names, in one folder of this user's."""
