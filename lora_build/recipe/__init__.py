"""Recipes: what a user wrote, from files and command lines to one checked value."""
