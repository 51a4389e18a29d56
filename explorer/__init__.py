"""Pages that show concepts to a person: a static site, its server, and the same charts as figures."""
