"""Tellers behind one door, for whoever serves them to others."""
