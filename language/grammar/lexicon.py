"""Words that a small tagger often gets wrong in prompts: what things look like, are made of, and are called."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white grey gray gold golden silver beige tan cream ivory maroon "
    "crimson scarlet magenta cyan teal turquoise lavender lilac indigo navy aqua aquamarine khaki bronze copper amber mauve burgundy "
    "fuchsia chartreuse peach coral mint olive lime salmon mustard ochre auburn blonde ruby emerald sapphire charcoal whitish "
    "reddish greenish bluish yellowish brownish pinkish purplish greyish grayish blackish multicolored multicoloured colorful "
    "colourful colored coloured rainbow monochrome vermilion plum rust azure cobalt russet taupe"
)
# These make one colour together with the colour after them.
SHADES = _words("light dark deep pale bright vivid pastel neon off electric royal midnight baby powder burnt")
TINTS = _words(
    "sky mint coral rose navy forest lime olive ruby emerald snow pearl lemon blood cherry jet steel ice sea ocean mustard apple "
    "chocolate coffee charcoal cobalt candy salmon brick wine slate ash moss jade sage sapphire cream hot peach lavender turquoise "
    "amber copper sunset sand canary milk honey bottle hunter"
)
MATERIALS = _words(
    "wood wooden metal metallic plastic glass rubber leather fabric cotton wool woolen woollen silk silken satin velvet denim linen "
    "lace fur paper cardboard ceramic porcelain clay stone marble granite concrete brick steel iron brass copper bronze tin chrome "
    "aluminum aluminium gold golden silver crystal diamond pearl bamboo wicker straw burlap nylon polyester canvas suede felt "
    "cork foam wax jade ivory oak mahogany titanium platinum cashmere tweed flannel corduroy terracotta adobe quartz vinyl acrylic asphalt"
)
SHAPES = _words(
    "round square circular rectangular triangular oval oblong spherical cubic cylindrical conical pyramidal pentagonal hexagonal "
    "octagonal teardrop diamond crescent heart star rhomboid trapezoidal elliptical cuboid curved straight flat angular pointed "
    "big small large little tiny huge giant tall short long wide narrow thick thin high low massive enormous miniature gigantic"
)
PATTERNS = _words(
    "striped checkered checked chequered plaid spotted dotted tartan patterned paisley floral speckled tiled polka"
)
TEXTURES = _words(
    "fluffy soft hard rough smooth shiny glossy matte fuzzy furry bumpy jagged spiky prickly silky sleek rusty rusted dusty wet dry "
    "crisp crispy crunchy juicy ripe sharp dull warm cool cold hot old new ancient modern clean dirty cozy damp slimy lumpy woven "
    "knitted transparent translucent opaque shimmering glittering sparkling polished cracked peeling weathered worn textured "
    "delicate fragrant sturdy thorny murky cute sticky wrinkled velvety feathery leathery scaly sandy muddy snowy icy rocky grassy "
    "frosty misty foggy sunny stormy iridescent pearlescent bulky busy quiet bare empty vintage antique rustic elegant fresh sweet "
    "sour tart spicy lush dense heavy loose tight bright dark dim faded plain ornate carved embroidered quilted frayed tattered "
    "mossy leafy hollow curly wavy braided ruffled pleated woolly grainy coarse gritty slick slippery fiery gentle vibrant greasy creamy chunky"
)
LOOKS = COLOURS | MATERIALS | SHAPES | PATTERNS | TEXTURES

# Styles of two words, and adjectives that name a style.
STYLES = {
    ("oil", "painting"), ("pixel", "art"), ("pop", "art"), ("line", "art"), ("art", "deco"), ("art", "nouveau"), ("van", "gogh"),
    ("low", "poly"), ("comic", "book"), ("stained", "glass"), ("pencil", "sketch"), ("pencil", "drawing"), ("studio", "ghibli"),
    ("paper", "cut"), ("ink", "wash"), ("oil", "paint"), ("concept", "art"), ("street", "art"), ("folk", "art"), ("claude", "monet"),
    ("digital", "art"), ("charcoal", "drawing"), ("water", "color"), ("ukiyo", "e"),
}  # fmt: skip

# Words before a noun that belong to its name although they look like modifiers; the names in the singular.
_NAMES = """
    hot dog, hot air, hot tub, hot chocolate, hot sauce, teddy bear, polar bear, red panda, blue jay, bald eagle,
    golden retriever, guinea pig, great dane, sweet potato, french fry, cotton candy, high heel, high chair, grand
    piano, electric guitar, acoustic guitar, remote control, stuffed animal, stuffed bear, stuffed toy, soft drink,
    hard drive, light bulb, light fixture, light switch, top hat, tin can, paper clip, paper towel, mobile phone, cell
    phone, smart phone, compact mirror, living room, dining room, dining table, dining chair, dining area, swimming
    pool, washing machine, frying pan, rocking chair, rocking horse, sewing machine, rolling pin, cutting board,
    watering can, magnifying glass, baking dish, measuring cup, mixing bowl, walking stick, sleeping bag, shopping
    bag, shopping cart, shopping mall, parking lot, parking sign, vending machine, hiking boot, hiking trail, running
    shoe, running track, riding boot, wedding dress, wedding cake, wedding ring, building block, building set, ironing
    board, fishing rod, fishing boat, bowling ball, bowling pin, bowling alley, boxing glove, coloring book, reading
    nook, reading lamp, reading chair, steering wheel, racing car, sailing boat, sailing ship, serving tray, playing
    card, solar panel, ferris wheel, wild flower, star fish, heart rate, gold fish, silver ware, black hole, black
    board, white board, red wine, white wine, green tea, black tea, black coffee, orange juice, orange tree, lemon
    tree, olive tree, olive oil, peach tree, plum tree, cherry tree, oak tree, mint leaf, rose bush, lavender field,
    lime juice, coral reef, rubber stamp, iron man, drinking glass, drinking fountain, chewing gum, boiling water,
    rainbow trout, christmas tree, flat screen, brick road, dried fruit, mashed potato, fried egg, fried rice, boiled
    egg, stained glass, stainless steel, wrought iron, polka dot, martial art, military uniform, medical mask, musical
    instrument, mechanical pencil, digital camera, diving board, diving suit, flying saucer, shooting star, potted
    plant, sand castle, cooling rack, cooking pot, chopping board, lighting fixture, picnic table, baby carriage, baby
    stroller, american flag, ice cream, sports car, fire truck, street light, traffic light
"""
NAMES = {tuple(name.split()) for name in _NAMES.split(",")}
# Materials and patterns of two words.
PAIRS = {
    ("stained", "glass"), ("stainless", "steel"), ("wrought", "iron"), ("polka", "dot"), ("tie", "dye"), ("faux", "leather"),
    ("faux", "fur"), ("solid", "gold"), ("solid", "wood"), ("patent", "leather"), ("leopard", "print"), ("zebra", "print"),
    ("camouflage", "print"), ("tiger", "print"), ("floral", "print"),
}  # fmt: skip
# "snow covered", "cream colored": these make one modifier with the word before them.
JOINED = _words(
    "covered colored coloured shaped patterned lined filled trimmed framed rimmed coated topped tipped themed inspired haired eyed "
    "tinted toned sized print"
)
# They stand before a noun but say which or how many, not what it looks like.
WHICH = _words(
    "next same other only first second third last own such single few various different several many more most both all each every "
    "another some any no one two three four five six seven eight nine ten dozen couple pair main front back left right upper lower "
    "middle top bottom half matching nearby"
)

# Who can wear and hold things.
ANIMATE = _words(
    "man woman boy girl child kid baby person people men women children lady gentleman guy king queen prince princess knight wizard "
    "witch soldier sailor pirate chef doctor nurse teacher student farmer dancer singer clown player runner skier astronaut "
    "firefighter policeman fireman officer worker artist musician fisherman elf fairy dwarf angel mermaid viking samurai ninja "
    "grandmother grandfather mother father bride groom monk cowboy superhero cat dog bear teddy robot penguin rabbit bunny fox deer "
    "tiger lion elephant monkey mouse rat horse cow sheep goat pig bird owl parrot duck frog panda koala squirrel hedgehog giraffe "
    "zebra wolf turtle dragon unicorn dinosaur mascot doll snowman puppy kitten hamster alien monster figure raccoon llama corgi "
    "poodle bulldog dachshund retriever hippo kangaroo otter gorilla chimpanzee skeleton zombie scarecrow mannequin toddler jockey"
)
WEARABLE = _words(
    "hat cap beanie helmet crown hood scarf tie bowtie necktie shirt t-shirt tshirt sweater jumper hoodie jacket coat cloak cape "
    "vest dress skirt gown suit tuxedo tracksuit uniform jeans pants trousers shorts leggings socks shoes boots sandals slippers "
    "heels gloves mittens glasses sunglasses goggles mask earrings earring necklace bracelet ring watch belt apron robe kimono sari "
    "backpack satchel bag purse handbag umbrella wig bandana headphones headband veil costume armor armour swimsuit bikini pajamas "
    "pyjamas overalls raincoat overcoat turban poncho collar bow ribbon mustache moustache beard cane sword shield lantern balloon "
    "bouquet briefcase suitcase book blouse cardigan blazer tunic monocle tiara pendant locket brooch badge sash shawl eyepatch"
)
# Always plural, so that they do not tell one wearer from two.
PAIRED = _words(
    "sunglasses glasses goggles jeans pants trousers shorts leggings socks shoes boots sandals slippers heels gloves mittens "
    "earrings headphones pajamas pyjamas overalls armor armour"
)
ROOMS = _words(
    "room kitchen bathroom bedroom restroom office garden park street scene house living restaurant cafe library studio"
)

# What says of a whole picture how it is made.
MEDIA = _words(
    "lighting quality photo photography photograph painting illustration art artwork render rendering resolution detail details focus "
    "shot masterpiece 4k 8k hd hdr uhd bokeh style composition cinematic realistic photorealistic hyperrealistic artstation detailed "
    "watercolor watercolour sketch drawing atmosphere aesthetic minimalist surreal render octane unreal engine mood trending "
    "dramatic"
)

# Verbs of place that a tagger takes for the last part of a noun: "the hat and coat hang on".
POSTURES = _words(
    "lie hang stand sit rest float sail lean sleep nap fly grow run walk hover perch rise swim glow shine sparkle gleam swing roll "
    "jump drift bloom fall sound burn wave dance"
)
# Nouns that end like participles.
THINGS = _words(
    "building ceiling painting wedding string ring king spring evening morning wing clothing earring lightning pudding railing "
    "drawing lighting sibling duckling viking engineering training paving awning icing"
)
