"""Everything that must survive a kill goes through here."""
