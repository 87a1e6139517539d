"""Training of the methods in the study of entropy schedules."""
