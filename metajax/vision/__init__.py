"""The image family: CLIP, prompt learners, their data, runs, evaluations and pages."""
