"""A training run around the loop: assembling it, its folder, its log, its failures, how it stops and resumes."""
