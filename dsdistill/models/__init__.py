"""Build teacher and student, and watch what they compute."""
