"""Sample quality: Fréchet distance and the statistics behind it, in float64."""
