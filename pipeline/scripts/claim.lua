#!lua flags=allow-oom
-- claim: take over pending entries of a consumer whose lease has lapsed.
-- KEYS[1] job:<stage>_in...
-- ARGV[1] group  ARGV[2] lapsed consumer  ARGV[3] heir  ARGV[4] at most (entries)  ARGV[5] 'idle' when the heir holds
--   nothing  ARGV[6] deliveries from which an entry is suspected of killing its holder
-- Returns: time (us), 'alive' | 'claimed' | 'empty' (the consumer is removed), entries left behind, then per entry four
--   values: entry id, delivery count, fields, lease URL ('' none).
-- Invariant: takes nothing while the lease lives; loses nothing when the heir dies half-way; a suspect is given only
--   to an idle heir, alone, so that it cannot take innocent neighbours with it.
local time = digits(clock_us())
local group, lapsed, heir = ARGV[1], ARGV[2], ARGV[3]
local most, suspect_from = tonumber(ARGV[4]), tonumber(ARGV[6])
if call('EXISTS', KEY.worker .. lapsed) == 1 then return {time, 'alive', 0} end
local rows = call('XPENDING', KEYS[1], group, '-', '+', 1000, lapsed)
if #rows == 0 then
  call('XGROUP', 'DELCONSUMER', KEYS[1], group, lapsed)
  return {time, 'empty', 0}
end
local ids, counts, suspect = {}, {}, nil
for _, row in ipairs(rows) do
  if row[4] >= suspect_from then
    suspect = suspect or row
  elseif #ids < most then
    ids[#ids + 1] = row[1]
    counts[row[1]] = row[4]
  end
end
if #ids == 0 and suspect and ARGV[5] == 'idle' then
  ids[1] = suspect[1]
  counts[suspect[1]] = suspect[4]
end
local answer = {time, 'claimed', #rows - #ids}
if #ids == 0 then return answer end
for _, entry in ipairs(call('XCLAIM', KEYS[1], group, heir, 0, unpack(ids))) do
  if entry then
    local id = id_of(field_of(entry[2], 'data'))
    answer[#answer + 1] = entry[1]
    answer[#answer + 1] = counts[entry[1]] + 1
    answer[#answer + 1] = entry[2]
    answer[#answer + 1] = id and call('HGET', KEY.live .. id, 'lease') or ''
  end
end
return answer
