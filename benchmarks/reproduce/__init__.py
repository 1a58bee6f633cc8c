"""The papers' claims at small scale: runs every recipe of configs/reproduce, then writes a page with what came out."""
