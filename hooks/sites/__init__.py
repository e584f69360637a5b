"""What a model attends with: discovery, the table of sites, and facts about positions, projections, arguments, denoisers and encoders."""
