#!lua flags=no-writes
-- lapsed: which consumers of a group have no lease?
-- KEYS the streams it reads   ARGV[1] group
-- Returns: time (us), then pairs: stream number, consumer.
local answer = {digits(clock_us())}
for number = 1, #KEYS do
  for _, row in ipairs(call('XINFO', 'CONSUMERS', KEYS[number], ARGV[1])) do
    local name = field_of(row, 'name')
    if call('EXISTS', KEY.worker .. name) == 0 then
      answer[#answer + 1] = number
      answer[#answer + 1] = name
    end
  end
end
return answer
