"""Looking at a backbone: frozen features, k-nearest neighbours, pictures of patch features."""
