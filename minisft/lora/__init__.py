"""Adapters: thin trained matrices beside a frozen network, put into it from outside."""
