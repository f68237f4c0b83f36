"""The server as a service of this user's: started at login, and again when it fails."""
