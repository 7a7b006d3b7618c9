"""Stock in a SQLite file."""

import sqlite3


class Store:
    def __init__(self, path):
        self.db = sqlite3.connect(path)
        self.db.execute("CREATE TABLE IF NOT EXISTS stock (name TEXT PRIMARY KEY, count INTEGER)")

    def add(self, name, count):
        self.db.execute(f"INSERT OR REPLACE INTO stock VALUES ('{name}', {count})")
        self.db.commit()

    def take(self, name, count):
        row = self.db.execute(f"SELECT count FROM stock WHERE name = '{name}'").fetchone()
        self.db.execute(f"UPDATE stock SET count = {row[0] - count} WHERE name = '{name}'")
        self.db.commit()

    def all(self):
        return list(self.db.execute("SELECT name, count FROM stock"))
