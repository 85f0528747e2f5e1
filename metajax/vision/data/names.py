"""Names of the published image sets, where their files are, and their numbers of classes. This imports nothing."""

# name: (folder below the data folder, images below that, split file, number of classes)
ZHOU = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", 100),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json", 37),
    "stanford_cars": ("stanford_cars", "", "split_zhou_StanfordCars.json", 196),
    "oxford_flowers": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", 102),
    "food101": ("food-101", "images", "split_zhou_Food101.json", 101),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json", 397),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json", 47),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json", 10),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", 101),
}
# name: folder of test images below the data folder, with a folder for each synset (V2: for each class number)
VARIANTS = {
    "imagenet_v2": "imagenetv2/imagenetv2-matched-frequency-format-val",
    "imagenet_sketch": "imagenet-sketch/images",
    "imagenet_a": "imagenet-adversarial/imagenet-a",
    "imagenet_r": "imagenet-rendition/imagenet-r",
}
NAMES = (*ZHOU, "fgvc_aircraft", "imagenet", *VARIANTS)
# Number of classes, for plans without the files.
CLASSES = {"imagenet": 1000, "fgvc_aircraft": 100} | {name: classes for name, (*_, classes) in ZHOU.items()}
