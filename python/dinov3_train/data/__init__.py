"""Images in, batches of crops and masks out: sources, decoding, augmentation, masking, sampling, loading."""
