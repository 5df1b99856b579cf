"""Teacher and student: building them, and watching what they compute."""
