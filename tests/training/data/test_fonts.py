from stylewright.training.data.fonts import font


def test_letters_of_other_languages_have_shapes_of_their_own():
    missing = font(14).getmask("\uffff")
    shapes = {bytes(font(14).getmask(letter)) for letter in "éłßñŽяΩ…"}
    assert len(shapes) == 8 and bytes(missing) not in shapes
