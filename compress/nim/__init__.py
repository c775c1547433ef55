"""Pruning as a game of Nim: layers are heaps, criteria are players, a move takes weights off one heap."""

from compress.nim.game import Move, NimGame, Play
from compress.nim.grundy import best_move, grundy, nim_sum, subtraction_grundy
from compress.nim.players import METHODS, PLAYERS, Player, players_of

__all__ = [
    "METHODS", "PLAYERS", "Move", "NimGame", "Play", "Player", "best_move", "grundy", "nim_sum", "players_of", "subtraction_grundy",
]  # fmt: skip
