"""Which words name a drug, a condition, an organism or a procedure: a short list, and word endings.

Endings reach what no list holds: drug names end by their class (USAN stems), conditions and
procedures by their Greek. Nothing here comes from any one data set.
"""

from __future__ import annotations

import re
from functools import lru_cache

from hallulib.detectors.tokens import stem

_LISTS = {
    "drug": """
    acetaminophen acyclovir adalimumab advil albuterol aleve allopurinol alprazolam amiodarone
    amlodipine amoxicillin aspirin atenolol azithromycin baclofen bupropion buspirone carbamazepine
    carvedilol cefazolin cefepime ceftriaxone cefuroxime celecoxib cephalexin cetirizine
    ciprofloxacin citalopram clonazepam clonidine clopidogrel clozapine colchicine cortisone
    cyclobenzaprine dabigatran dapsone dexamethasone diazepam diclofenac digoxin diltiazem
    diphenhydramine donepezil doxycycline epinephrine escitalopram estradiol famotidine fentanyl
    ferrous finasteride fluoxetine fluticasone folate folic furosemide gabapentin gentamicin
    glipizide glyburide haloperidol heparin hydralazine hydrochlorothiazide hydrocodone
    hydroxychloroquine hydroxyzine ibuprofen indomethacin insulin ipratropium isoniazid isosorbide
    ketorolac lamotrigine lasix levetiracetam levodopa levothyroxine lipitor lithium loperamide
    loratadine lorazepam losartan magnesium meloxicam memantine metformin methadone methotrexate
    methylphenidate metoclopramide metoprolol metronidazole mirtazapine montelukast morphine motrin
    naloxone naproxen nifedipine nitrofurantoin nitroglycerin olanzapine ondansetron oxybutynin
    oxycodone pantoprazole paracetamol penicillin phenytoin pioglitazone plavix potassium
    prednisolone prednisone pregabalin prochlorperazine progesterone promethazine propranolol
    quetiapine ramipril ranitidine rifampin risperidone rivaroxaban salbutamol senna sertraline
    sildenafil spironolactone sulfa sulfamethoxazole sulfasalazine sumatriptan synthroid tamoxifen
    tamsulosin testosterone theophylline thyroxine tiotropium topiramate tramadol trazodone
    trimethoprim tylenol valproate vancomycin venlafaxine verapamil warfarin xanax zoloft zolpidem
    """,
    "condition": """
    abscess adhesion allergy alzheimer amyloid anaphylaxis aneurysm angina anxiety apnea appendix
    arrest arrhythmia ascites asthma ataxia autism bipolar bleed cancer cataract cellulitis
    cholestasis chorea claudication clot colic coma concussion constipation copd cough croup
    cushing cyst dehydration delirium dementia depression depressive diabetes diarrhea dislocation
    disorder diverticula eczema edema effusion embolism embolus emphysema epilepsy erythema failure
    fever fibroid fibromyalgia fistula flu fracture gallstone gangrene gerd goiter gout headache
    hematoma hemorrhoid hepatitis hernia hiv hypertension hypotension hyperlipidemia
    hypercholesterolemia hypothyroidism hyperthyroidism icterus ileus incontinence infarct
    infarction infection influenza injury insomnia insufficiency ischemia itch jaundice keloid lupus
    lymphoma malaria malignancy mania measles melanoma melena migraine murmur nausea nephrolithiasis
    neuropathy nodule obesity occlusion osteopenia osteoporosis otitis palpitation pallor palsy
    parkinson perforation pneumonia pneumothorax polyp pregnancy preeclampsia psoriasis psychosis
    ptsd rash rabies reflux regurgitation rhinitis rickets rupture sarcoid scabies schizophrenia
    sciatica scoliosis seizure sepsis shingles shock sprain stenosis stroke swelling syncope
    syndrome syphilis tachycardia tetanus thrombosis thrombus tinnitus torsion tremor tuberculosis
    tumor ulcer urticaria varicella vasculitis vertigo virus vomit wart weakness wheeze
    """,
    "organism": """
    bacillus candida chlamydia clostridium coli enterococcus giardia gonorrhoeae klebsiella
    mycoplasma neisseria plasmodium pneumoniae proteus pseudomonas rickettsia rubella salmonella
    shigella toxoplasma treponema trichomonas vaginalis cytomegalovirus
    """,
    "procedure": """
    angiography angioplasty appendectomy biopsy bronchoscopy bypass catheter catheterization
    chemotherapy cholecystectomy colonoscopy ct dialysis echocardiogram eeg ekg ecg endoscopy
    hysterectomy intubation laparoscopy laparotomy mastectomy mri physiotherapy radiotherapy
    splenectomy stent surgery tracheostomy transfusion transplant ultrasound vaccine vasectomy xray
    """,
}
# as they end after `stem`, which cuts a final "e"
_ENDINGS = [
    ("drug", r"pril|sartan|olol|statin|cillin|mycin|micin|floxacin|cyclin|conazol|prazol|tidin"
             r"|triptan|setron|dipin|afil|gliptin|gliflozin|glutid|parin|xaban|mab|tinib|navir"
             r"|ciclovir|cain|azepam|azolam|barbital|oxetin|triptylin|metason|nisolon|terol"
             r"|tropium|lukast|zosin|dronat|thiazid|semid|glitazon"),
    ("organism", r"cocc(?:us|i)|bacter|bacterium|bacillus|monas|(?:one|ge|uce|ote|ure)lla|virus"),
    ("procedure", r"ectomy|otomy|ostomy|plasty|scopy|opsy|(?:angi|mamm|ven|ventricul)ography"
                  r"|centesis|(?:cardio|encephalo|myo|mammo)gram"),
    ("condition", r"itis|(?<!gn)osis|oma|[ae]mia|uria|algia|pathy|plegia|paresis|rrh[o]?ea"
                  r"|rrhag|megaly|penia|ectasis|ectasia|trophy|malacia|phagia|phasia|pn[o]?ea"),
]  # fmt: skip
_PATTERNS = [(kind, re.compile(rf"\w{{2,}}(?:{ending})")) for kind, ending in _ENDINGS]
_SHORTEST = 6  # letters from which an ending says anything ("coma" is not a tumour)


_STEMS = {kind: frozenset(map(stem, words.split())) for kind, words in _LISTS.items()}


@lru_cache(maxsize=65536)
def name_term(stemmed: str) -> str:
    """Return "drug", "condition", "organism" or "procedure" for a word stem, "" for other words."""
    for kind, stems in _STEMS.items():
        if stemmed in stems:
            return kind
    if len(stemmed) >= _SHORTEST:
        for kind, pattern in _PATTERNS:
            if pattern.fullmatch(stemmed):
                return kind
    return ""
