"""What is collected: the pictures of each set, by their names in the packages they come from.

The tasks of the stream use the sets whose `use` is "stream". All other sets are free for training a base.
"""

from __future__ import annotations

# Name in the stream -> name of the drawing, where the two differ.
RENAMED = {"bee": "honeybee", "sheep": "ewe", "ladybug": "lady-beetle", "hippo": "hippopotamus"}

ANIMALS = (
    "ant", "badger", "bat", "bear", "beaver", "bee", "bison", "blowfish", "boar", "butterfly", "camel",
    "cat", "chicken", "chipmunk", "cockroach", "cow", "crab", "cricket", "crocodile", "deer", "dodo",
    "dog", "dolphin", "donkey", "dove", "dragon", "duck", "eagle", "elephant", "fish", "flamingo",
    "fly", "fox", "frog", "giraffe", "goat", "goose", "gorilla", "hamster", "hedgehog", "hippo",
    "horse", "jellyfish", "kangaroo", "koala", "ladybug", "leopard", "lion", "lizard", "llama",
    "lobster", "mammoth", "monkey", "moose", "mosquito", "mouse", "octopus", "orangutan", "otter",
    "owl", "ox", "oyster", "panda", "parrot", "peacock", "penguin", "pig", "poodle", "rabbit",
    "raccoon", "ram", "rat", "rhinoceros", "rooster", "scorpion", "seal", "shark", "sheep", "shrimp",
    "skunk", "sloth", "snail", "snake", "spider", "squid", "swan", "tiger", "turkey", "turtle",
    "unicorn", "whale", "wolf", "worm", "zebra", "beetle", "orca",
)  # fmt: skip

FOODS = (
    "banana", "carrot", "cookie", "croissant", "cupcake", "doughnut", "egg", "eggplant", "grapes",
    "green-apple", "hamburger", "hot-dog", "ice-cream", "lemon", "onion", "peach", "pear", "pineapple",
    "pizza", "potato", "pretzel", "red-apple", "sandwich", "strawberry", "sushi", "taco", "tangerine",
    "tomato", "waffle", "watermelon",
)  # fmt: skip

# Emoji categories that show things. People, letters and flags are left out.
THINGS = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
)
# Noto drawings beside the animals: another drawing of things that Fluent shows too.
NOTO_FREE = ("Activities", "Food & Drink", "Objects", "Travel & Places")

SYMBOL_CATEGORIES = (
    "Agriculture", "Animal", "Automotive", "Clothing", "Food / Drink", "Gaming / RPG",
    "Hardware / Tools", "Holiday", "Music", "Nature", "Science", "Shape", "Sport",
    "Transportation + Flying", "Transportation + Other", "Transportation + Road",
    "Transportation + Water", "Weather",
)  # fmt: skip

NUM_FLAGS = 120
# Flags of regions that fly another country's flag, and names that no short question holds.
NO_FLAGS = ("um", "bv", "hm", "mf", "sj", "gp", "re", "pm", "yt", "gf", "wf", "bq", "sh", "io")

# Surface -> (photo, square of the training split, square of the test split): left, top, right, bottom.
Box = tuple[int, int, int, int]
SURFACES: dict[str, tuple[str, Box, Box]] = {
    "brick": ("brick.png", (0, 0, 256, 256), (256, 256, 512, 512)),
    "grass": ("grass.png", (0, 0, 256, 256), (256, 256, 512, 512)),
    "gravel": ("gravel.png", (0, 0, 256, 256), (256, 256, 512, 512)),
    "fur": ("chelsea.png", (40, 20, 225, 205), (226, 60, 376, 210)),
    "coins": ("coins.png", (0, 0, 192, 192), (192, 0, 384, 192)),
    "stars": ("hubble_deep_field.jpg", (0, 0, 500, 500), (500, 0, 1000, 500)),
    "tissue": ("ihc.png", (0, 0, 256, 256), (256, 0, 512, 256)),
    "retina": ("retina.jpg", (230, 465, 705, 940), (705, 465, 1180, 940)),
    "ink": ("text.png", (0, 0, 172, 172), (276, 0, 448, 172)),
    "wood": ("coffee.png", (470, 0, 600, 130), (470, 270, 600, 400)),
    "cloth": ("astronaut.png", (50, 300, 180, 430), (190, 300, 320, 430)),
    "sky": ("rocket.jpg", (90, 0, 300, 210), (345, 0, 555, 210)),
}
# Photos that no task uses.
FREE_PHOTOS = {
    "field": "camera.png",
    "cell": "cell.png",
    "clock": "clock_motion.png",
    "vessels": "microaneurysms.png",
    "horse": "horse.png",
}
# Surfaces that food lies on.
GROUNDS = ("brick", "grass", "gravel", "wood", "cloth", "sky")

# Digit scans of each class: training, test, free for a base. The collection has 500 of each class.
DIGIT_SHARES = {"digits-train": 200, "digits-test": 80, "digits-free": 220}
