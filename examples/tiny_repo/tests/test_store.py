from shelf.store import Store


def test_add_and_take(tmp_path):
    store = Store(tmp_path / "stock.db")
    store.add("screws", 120)
    store.take("screws", 20)
    assert store.all() == [("screws", 100)]
