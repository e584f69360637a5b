"""What methods are made with: the base class, the registry, `apply`, profiles, and what several methods share by subject. No method."""
