"""The main job: the posterior of a scene given one picture of it, from files to a folder of results."""
