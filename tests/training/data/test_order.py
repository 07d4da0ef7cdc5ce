from collections import Counter

from stylewright.training.data.order import Order, turns


def test_turns_are_exact_and_even():
    assert turns([3]) == [0]
    assert turns([1, 1]) == [0, 1]
    assert turns([6, 2]) == turns([3, 1]) == [0, 1, 0, 0]
    cycle = turns([7, 5, 1])
    assert Counter(cycle) == {0: 7, 1: 5, 2: 1}
    for length in range(1, 14):
        for group, size in enumerate([7, 5, 1]):
            assert abs(cycle[:length].count(group) - size * length / 13) < 1


def test_pools_take_turns_by_their_seats_and_groups_by_their_size():
    order = Order([[[0, 1], [2]], [[3]]], [3, 1])
    batches = [order.batch(5, index, 1)[0] for index in range(12)]
    assert [number == 3 for number in batches[:4]].count(True) == 1
    assert Counter(batches) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_an_order_depends_on_seed_and_place_alone():
    order = Order([[[0, 1, 2, 3, 4]]], [1])
    straight = [order.batch(0, index, 2) for index in range(20)]
    assert order.batch(0, 13, 2) == straight[13]
    assert straight != [order.batch(1, index, 2) for index in range(20)]
    for start in (0, 5, 10, 15):  # two epochs
        assert Counter(n for batch in straight[start : start + 5] for n in batch) == dict.fromkeys(range(5), 2)
