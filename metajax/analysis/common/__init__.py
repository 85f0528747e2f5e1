"""What several analyses share: the study they measure, labelled documents, timing."""
