"""The image family whole: CLIP, prompt learners, their data, runs, evaluations and pages."""
