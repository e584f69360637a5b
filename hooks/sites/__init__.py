"""What a model attends with: discovery, the table of sites, facts about rotary positions and denoisers."""
