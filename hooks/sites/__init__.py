"""What a model attends with: discovery, the table of sites; facts of positions, projections, arguments, denoisers, encoders."""
