"""Pictures and clips as cluster labels: descriptors, spherical k-means, and the ten nearest centers of each sample."""
