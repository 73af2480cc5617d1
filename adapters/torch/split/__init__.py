"""Models split over ranks, for PyTorch: layers of which each rank holds a part, and consecutive stages."""
