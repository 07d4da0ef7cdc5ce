"""The main job, shown: one picture, two laws of the noise level, and what each has learned after the same steps."""
