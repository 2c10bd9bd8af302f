"""From a raw pool of images to a training set: embed, find duplicates, cluster, sample, retrieve, write a manifest."""
