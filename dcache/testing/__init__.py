"""Tests that run on any policy: golden traces of the published methods, and properties every cache policy must have."""
